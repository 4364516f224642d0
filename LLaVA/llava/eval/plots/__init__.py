"""What the figures are drawn from and how."""
