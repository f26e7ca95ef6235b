"""The paper's published figures, the recipes that reproduce them, and what a recipe costs."""
