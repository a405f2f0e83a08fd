"""Golden outputs: `pytest tests/spec/ctl --update-golden` writes them anew; read the difference."""


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")
