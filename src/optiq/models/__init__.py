"""From a source to modules and streamed blocks."""
