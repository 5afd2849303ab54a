"""Text into tokenised domains."""
