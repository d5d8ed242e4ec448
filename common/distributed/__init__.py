"""What the launcher and the hardware decided."""
