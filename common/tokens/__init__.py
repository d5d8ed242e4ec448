"""Documents -> token ids -> .bin/.idx files, and back."""
