"""One worker process: the way of a row. `loop` alone knows every stage and reads as the architecture."""
