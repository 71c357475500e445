"""Stage `test`: examine base and tuned model side by side."""
