"""Files: written whole or not at all, and what they tell without the model's code."""
