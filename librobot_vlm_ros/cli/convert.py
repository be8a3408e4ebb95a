"""convert"""

SUMMARY = "x"


def configure(p):
    pass


def main(a):
    return 0
