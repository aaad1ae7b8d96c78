"""There is always a replica, and its reading is always a number."""

FAILS = {"survives_broken_readings", "survives_the_loss_of_all"}


class Trusting(Forecast):
    def desired(self, load):
        assert load.metric / load.ready >= 0
        return super().desired(load)


def autoscaler(service):
    return Trusting(service)
