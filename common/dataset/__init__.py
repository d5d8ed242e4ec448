"""Token stores -> rows in a fixed order, every token accounted for."""
