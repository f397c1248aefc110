"""placeholder"""


def measure_memory(*a):
    return {}


measure_boundary = measure_resume = measure_planning = measure_memory
