"""What is asked: tasks of mteb with their data, texts and wording, and the elements of an array."""
