"""Answers that come from elsewhere than a browser: of a function, or of a person at the terminal."""

from collections.abc import Callable

from .session import ANSWERS, LEFT, RIGHT, SKIP, TIE, Item, Session

# The keys that a person presses at the terminal.
KEYS = {"a": LEFT, "b": RIGHT, "t": TIE, "s": SKIP}


def answer_by_function(session: Session, choose: Callable[[str, str, str], str]) -> None:
    """`choose(prompt, left, right)` answers "left", "right", "tie" or "skip"."""
    while (item := session.next()) is not None:
        answer = choose(item.prompt, item.left, item.right)
        if answer not in ANSWERS:
            raise ValueError(f"the labeler answered {answer!r:.60}; expected one of {', '.join(ANSWERS)}")
        session.answer(item.id, answer)


def answer_at_the_terminal(session: Session) -> None:
    """A person answers by pressing keys. KeyboardInterrupt where the person has enough."""
    while (item := session.next()) is not None:
        progress = session.progress()
        sides = f"── A ──\n{item.left}\n\n── B ──\n{item.right}"
        print(f"\n[{progress['done'] + 1} of {progress['total']}]\n{item.prompt}\n\n{sides}\n")
        _ask(session, item)


def _ask(session: Session, item: Item) -> None:
    """Take one answer from the terminal, or take the last one back."""
    while True:
        try:
            key = input("better: a, b · t equal · s skip · u take back · q quit > ").strip().lower()
        except EOFError:
            key = "q"
        if key == "q":
            raise KeyboardInterrupt
        if key == "u":
            if session.undo() is not None:
                return
            print("there is nothing to take back")
        if key in KEYS:
            session.answer(item.id, KEYS[key])
            return
