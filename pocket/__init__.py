"""The bundled pocket model: its weights, the world that it draws, the recipe that trained it."""
