"""How far a student is: one line per question, from the visible tests, in a few seconds."""
from homework.course import graded
from homework.kit import STUDENTS_SEED, judged, truth_of
from homework.sandbox import trial


def lines(name, seconds=10.0):
    """Run the visible tests of NAME.py here -> a line for each question, and points, of."""
    questions = {}
    for test in graded(name, further=True):
        if test.hidden:
            continue
        seen, failed = trial(test, STUDENTS_SEED, seconds)
        right, of, wrong = judged(seen, failed, truth_of(test, STUDENTS_SEED))
        questions.setdefault(test.exercise, []).append((test, wrong, right, of))
    found = []
    got = most = 0
    for target, tests in questions.items():
        points = sum(t.points for t, wrong, *_ in tests if not wrong)
        whole = sum(t.points for t, *_ in tests)
        wrong = next((wrong for _, wrong, *_ in tests if wrong), "")
        checks = f" ({sum(r for *_, r, _ in tests)} of {sum(n for *_, n in tests)} checks)" if wrong else ""
        if wrong == "not written yet":
            checks = ""
        found.append(
            f"    {points} of {whole}  {target.partition('.')[2] or 'capstone':40s} {wrong}{checks}".rstrip(
            ))
        got += points
        most += whole
    return found, got, most
