"""Model families as plain single-device PyTorch, one file a family."""
