"""A name -> documents, counted."""
