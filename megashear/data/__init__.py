"""From jsonl per domain to batches of a mixture that follows the loss."""
