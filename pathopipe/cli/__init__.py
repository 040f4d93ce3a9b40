"""The command line: reads what the user typed, calls the rooms below, says what came of it. Alone prints and exits."""
