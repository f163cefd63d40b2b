def get_sequences(num_sequences: int = 1000) -> list[tuple[dict, tuple[str, ...]]]:
    return [
        ({"led": number}, ("open_drawer", "push_red", "lift", "close_drawer", "led")) for number in range(num_sequences)
    ]
