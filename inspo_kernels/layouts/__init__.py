"""Turn preference pairs into sequences: padded rows, packed rows, and trees that hold the prompt once."""
