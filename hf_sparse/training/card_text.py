"""Take the text of a model card from the arguments of Trainer's push and card methods."""

from dataclasses import dataclass

from hf_sparse.checkpoint.card import CardFields

Words = str | list[str] | None


@dataclass(frozen=True)
class CardText:
    """What a card says beside what is measured; named as the arguments of `Trainer.create_model_card`.

    Attributes:
        language: of the texts.
        license: of the weights.
        tags: beside hf_sparse's own.
        model_name: what the card calls it.
        finetuned_from: the model that was pruned, as an id on the Hub.
        tasks: what it does, the first of them, as the Hub calls it.
        dataset_tags: the first of the data sets, as an id on the Hub.
        dataset: what it was trained on, for people.
        dataset_args: which part of that.
        dataset_name: what TRL calls `dataset_tags`.
    """

    language: str | None = None
    license: str | None = None
    tags: Words = None
    model_name: str | None = None
    finetuned_from: str | None = None
    tasks: Words = None
    dataset_tags: Words = None
    dataset: Words = None
    dataset_args: Words = None
    dataset_name: str | None = None

    def fields(self, repository: str) -> CardFields:
        """The fields of a card of the model in a repository."""
        return CardFields(repository, self.model_name, self.language, self.license, tuple(_listed(self.tags)))

    def origin(self) -> dict[str, str]:
        """What is said of a model's `Origin`, by the names of its fields."""
        said = {
            "base_model": self.finetuned_from,
            "task": next(iter(_listed(self.tasks)), None),
            "dataset": ", ".join([*_listed(self.dataset), *_listed(self.dataset_args)]),
            "dataset_id": next(iter(_listed(self.dataset_tags or self.dataset_name)), None),
        }
        return {name: value for name, value in said.items() if value}


def _listed(given: Words) -> list[str]:
    return [given] if isinstance(given, str) else given or []
