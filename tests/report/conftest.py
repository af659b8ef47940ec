import pytest


@pytest.fixture(scope="session")
def study(known_law_tables):
    """Every approach, fitted to the tables of the known law."""
    from lm import fit

    return fit.fit(*fit.read([known_law_tables[0]]), bootstrap=100)


@pytest.fixture(scope="session")
def drawn(study):
    """That study's figures, SVG by name."""
    from lm.report.figures import figures

    return figures(study.fits, study.runs, study.curves)
