from dataclasses import fields

from click.testing import CliRunner

from data_pipeline.filters.registry import FILTERS
from megagpt.cli import main


def test_the_reference_of_a_data_job_names_every_setting_of_every_filter_with_its_default():
    page = CliRunner().invoke(main, ["config", "docs", "--job", "data"]).output
    for name, (kind, _) in FILTERS.items():
        assert f"### filters.{name}\n" in page
        for field in fields(kind):
            assert f"- `filters.{name}.{field.name}`: " in page
    assert "- `filters.gopher_quality.min_words`: int, at least 0, or null; default 50." in page
    assert "- `filters.pii.kinds`: list of some of email, ip, card, phone; default email, ip, card, phone." in page
    assert "- `filters.classifier.model`: path; required.\n  A model of `megagpt data train-classifier`" in page


def test_the_reference_of_training_has_no_filters():
    assert "filters." not in CliRunner().invoke(main, ["config", "docs"]).output
