"""The well-tested parts that the recipes share. Data flows one way, from ``corpus`` to ``report``."""
