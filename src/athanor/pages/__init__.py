"""Web pages that need no other file: one style, and templates filled in."""
