"""Completions compared by people: `session.py` keeps what they answer, `web_page.py` asks in a browser."""
