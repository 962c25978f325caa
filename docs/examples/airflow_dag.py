"""A night a day with Airflow: one task, since `nightly` resumes by itself at the first stage that has not succeeded."""

from datetime import datetime, timedelta

from airflow import DAG
from airflow.providers.standard.operators.bash import BashOperator

CHECKOUT = "/opt/mtmh"
CONFIG = "/etc/mtmh/shop.yaml"

with DAG(
    dag_id="mtmh",
    schedule="0 2 * * *",
    start_date=datetime(2024, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=10), "cwd": CHECKOUT},
) as dag:
    # The UTC day that has ended, whether a cron string makes an interval of a day (Airflow 2) or a point in time (Airflow 3).
    # A retry after exit codes 2 to 4, which need a person, costs only the seconds until the message is said again.
    night = BashOperator(
        task_id="night",
        bash_command=f".venv/bin/python -m jobs.nightly --run-date {{{{ macros.ds_add(data_interval_end | ds, -1) }}}} --config {CONFIG}",
    )
    maintain = BashOperator(task_id="maintain", bash_command=f".venv/bin/python -m jobs.maintain --config {CONFIG}")
    night >> maintain
