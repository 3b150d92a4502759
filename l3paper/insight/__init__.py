"""What a trained model knows at every depth, and what its rows hold."""
