"""What runs in place of the stock layer's parts."""
