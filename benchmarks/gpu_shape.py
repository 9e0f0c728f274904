"""What the measurements on a GPU share: the shape of a 1B model, and what a card can do at most."""

OLMO2_1B = {
    "vocab_size": 100_352,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
}
# The same code in seconds on a CPU.
TINY = {
    **OLMO2_1B,
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
# Dense bfloat16 peaks of the tensor cores in FLOP/s, from the makers' data sheets (SXM where there is one).
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "L40": 181e12}


def peak_flops(device_name: str) -> float | None:
    """The peak of a card by the name its driver gives, or None where it is not known."""
    return next((peak for card, peak in PEAKS.items() if card in device_name), None)
