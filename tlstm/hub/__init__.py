"""The Hugging Face Hub: finding and fetching checkpoints, pushing them, and the cards that tell what they are."""
