"""What came out of a training: a model read from anywhere, judged and used."""
