"""The studio: a page in the browser over the command `sample`."""
