"""The built-in model: its weights, and the world, tasks and stages that it was trained with."""
