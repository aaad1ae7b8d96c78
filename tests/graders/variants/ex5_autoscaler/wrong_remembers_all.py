"""What was wanted once may be wanted again: nothing is forgotten."""

FAILS = {"same_loads_same_answers"}


class Faithful(Forecast):
    def reset(self):
        if not hasattr(self, "seen"):
            super().reset()


def autoscaler(service):
    return Faithful(service)
