"""Fixtures shared by the tests of `dalle`."""

from __future__ import annotations

import socket

import pytest

from support.prior import make_parts


@pytest.fixture(scope="module")
def parts():
    """What a small prior is trained with: tokenizer, dVAE, pairs."""
    return make_parts()


@pytest.fixture
def no_sockets(monkeypatch):
    """R30: every attempt to open or resolve a connection is counted and refused."""
    attempts = []

    def refuse(*arguments, **_):
        attempts.append(arguments)
        raise OSError("sockets are blocked")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return attempts
