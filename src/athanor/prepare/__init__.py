"""Stage `prepare`: check the rows in data/ and bring them into one form."""
