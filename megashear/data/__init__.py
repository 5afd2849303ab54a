"""From tokenised domains to batches of a mixture that follows the loss."""
