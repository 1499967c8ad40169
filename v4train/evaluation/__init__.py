"""What a trained model is worth: bits per byte by source and position, recall by distance, lm_eval tasks."""
