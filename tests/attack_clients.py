"""Hostile clients of one server, beside a polite one: see attack.py."""


def attack_server(seconds, seed, root, folder, flags):
    raise NotImplementedError
