"""What the load asks for is what there should be; bounds are not its business."""

FAILS = {"stays_within_bounds", "survives_broken_readings"}


def autoscaler(service):
    return Forecast(
        Service(service.service_s, service.promise_s, minimum=1, maximum=99)
    )
