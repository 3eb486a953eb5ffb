"""What the activations of every layer are like, and how far batch-norm statistics lag behind them."""
