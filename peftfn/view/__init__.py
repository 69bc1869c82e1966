"""The adapted model as an nn.Module."""
