"""What is to be done, and what it will give and cost."""
