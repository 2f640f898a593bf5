"""Online learning in rounds: the model samples, a judge or people compare, the model learns, and samples again."""
