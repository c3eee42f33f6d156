# MLflow's server with drivers for PostgreSQL and S3.
FROM python:3.11-slim-bookworm
RUN pip install --no-cache-dir --disable-pip-version-check mlflow==3.17.2 psycopg2-binary==2.9.13 boto3==1.44.8 \
 && useradd --uid 10002 --create-home mlflow
USER 10002
EXPOSE 5000
ENTRYPOINT ["mlflow"]
