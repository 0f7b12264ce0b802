"""How far a student is: one line per question, from the visible tests, in a few seconds."""
from homework.course import graded
from homework.kit import STUDENTS_SEED, judged, truth_of
from homework.sandbox import trial


def lines(name, seconds=10.0, capstones=False):
    """Run the visible tests of NAME.py here -> a line for each question, and points, of. capstones: train
    those, too, for up to a minute each.
    """
    questions = {}
    for test in graded(name, further=True):
        if test.hidden or test.goals and not capstones:
            continue
        seen, failed = trial(test, STUDENTS_SEED, seconds * (6 if test.goals else 1))
        right, of, wrong = judged(seen, failed, truth_of(test, STUDENTS_SEED))
        points = points_of(test.points, right, of, wrong, partial=bool(test.goals))
        questions.setdefault(test.exercise, []).append((points, test.points, wrong, right, of))
    found = []
    for target, tests in questions.items():
        points, whole = (sum(row[i] for row in tests) for i in (0, 1))
        wrong = next((row[2] for row in tests if row[2]), "")
        checks = ""
        if wrong and wrong != "not written yet":
            checks = f" ({sum(row[3] for row in tests)} of {sum(row[4] for row in tests)} checks)"
        question = target.partition(".")[2] or "capstone"
        found.append(f"    {points:g} of {whole}  {question:40s} {wrong}{checks}".rstrip())
    rows = [row for tests in questions.values() for row in tests]
    return found, sum(row[0] for row in rows), sum(row[1] for row in rows)


def points_of(worth, right, of, wrong, partial):
    """The points of a test of whose `of` checks so many are right. partial: for their share, too."""
    if not wrong:
        return worth
    return round(worth * right / max(of, 1), 1) if partial else 0
