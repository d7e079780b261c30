"""The bundled pocket model: its weights and the world that it draws."""
