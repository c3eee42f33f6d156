{{- define "assay.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end }}

{{- define "assay.labels" -}}
app.kubernetes.io/name: assay
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- /* Of pods of one kind: (list . "service"). */ -}}
{{- define "assay.selector" -}}
app.kubernetes.io/name: assay
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "assay.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "assay.gpuImage" -}}
{{ .Values.image.repository }}:{{ .Values.ray.gpu.tag | default (printf "%s-gpu" .Chart.AppVersion) }}
{{- end }}

{{- define "assay.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "assay.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* A claim's spec: a volume of the values. */ -}}
{{- define "assay.claim" -}}
accessModes: {{ .accessModes | default (list "ReadWriteOnce") | toJson }}
{{- with .storageClass }}
storageClassName: {{ . }}
{{- end }}
resources:
  requests:
    storage: {{ .size }}
{{- end }}

{{- /* One table of TOML. */ -}}
{{- define "assay.toml" -}}
{{- range $name, $value := . }}
{{ $name }} = {{ $value | toJson }}
{{- end }}
{{- end }}

{{- /* A pod of the Ray cluster: root, name of its volume and settings, image, resources, isHead, isGpu. */ -}}
{{- define "assay.rayPod" -}}
spec:
  automountServiceAccountToken: false
  {{- with .root.Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext: {{- include "assay.podSecurity" .root | nindent 4 }}
  containers:
    - name: ray
      image: {{ .image }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      env:
        - {name: ASSAY_HOME, value: /var/lib/assay}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        {{- with .root.Values.trackingUri }}
        - {name: ASSAY_CONFIG, value: /etc/assay/assay.toml}
        {{- end }}
      {{- if .isHead }}
      ports:
        - {name: gcs, containerPort: 6379}
        - {name: jobs, containerPort: 8265}
      {{- end }}
      resources: {{- toYaml .resources | nindent 8 }}
      volumeMounts:
        - {name: home, mountPath: /var/lib/assay}
        {{- if .root.Values.trackingUri }}
        - {name: config, mountPath: /etc/assay, readOnly: true}
        {{- end }}
  volumes:
    - name: home
      persistentVolumeClaim: {claimName: {{ .name }}}
    {{- if .root.Values.trackingUri }}
    - name: config
      configMap: {name: {{ .name }}}
    {{- end }}
  {{- if .isGpu }}
  tolerations:
    - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}
  {{- end }}
{{- end }}
