{{/* Short enough for pods' names and workers' ids: at most 64 with "-workers-NN-wNN". */}}
{{- define "epserve.fullname" -}}
{{- $name := .Values.fullnameOverride -}}
{{- if not $name -}}
{{- $part := default .Chart.Name .Values.nameOverride -}}
{{- $name = ternary .Release.Name (printf "%s-%s" .Release.Name $part) (contains $part .Release.Name) -}}
{{- end -}}
{{- $name = $name | trunc 40 | trimSuffix "-" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "values: full name %q is no name of a Service; set fullnameOverride" $name) -}}
{{- end -}}
{{- $name -}}
{{- end }}

{{- define "epserve.selectorLabels" -}}
app.kubernetes.io/name: epserve
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "epserve.labels" -}}
{{ include "epserve.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | quote }}
{{- end }}

{{- define "epserve.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end }}

{{- define "epserve.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "epserve.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{- define "epserve.numWorkers" -}}
{{- mul .Values.workers.pods .Values.workers.perPod -}}
{{- end }}

{{/* Ranks that the experts are spread over. */}}
{{- define "epserve.numRanks" -}}
{{- $w := .Values.workers -}}
{{- $ranks := sub (include "epserve.numWorkers" . | int) (int $w.standbys) | int -}}
{{- if lt $ranks 1 -}}
{{- $text := "values: workers.standbys %d leaves no rank of workers.pods %d times workers.perPod %d; lower it" -}}
{{- fail (printf $text (int $w.standbys) (int $w.pods) (int $w.perPod)) -}}
{{- end -}}
{{- /* Of host workers, which are one pod, the schema bounds perPod. */ -}}
{{- if and (gt $ranks 8) (ne .Values.backend "host") -}}
{{- $text := "values: workers.pods %d times workers.perPod %d less workers.standbys %d is %d ranks, above the 8 of backend %s; lower them" -}}
{{- fail (printf $text (int $w.pods) (int $w.perPod) (int $w.standbys) $ranks .Values.backend) -}}
{{- end -}}
{{- $least := mul 2 $ranks -}}
{{- if lt (int .Values.maxBatchTokens) (int $least) -}}
{{- $text := "values: maxBatchTokens %d is below %d, which the readiness probe of %d workers needs; raise it" -}}
{{- fail (printf $text (int .Values.maxBatchTokens) $least $ranks) -}}
{{- end -}}
{{- $ranks -}}
{{- end }}

{{/* Takes a Kubernetes quantity of bytes, a number or a string. */}}
{{- define "epserve.bytes" -}}
{{- $text := kindIs "string" . | ternary (toString .) (. | int64 | toString) -}}
{{- $number := regexFind "^[0-9]+([.][0-9]+)?([eE][0-9]+)?" $text -}}
{{- $units := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "m" 1e-3 -}}
{{- $units = merge $units (dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776) -}}
{{- $unit := trimPrefix $number $text -}}
{{- if or (not $number) (not (hasKey $units $unit)) -}}
{{- fail (printf "values: memory %q is not a quantity of bytes; write it as 2Gi" $text) -}}
{{- end -}}
{{- mulf (float64 $number) (get $units $unit | float64) | floor | int64 -}}
{{- end }}

{{/* Most bytes that requests and replies hold; with what gRPC buffers, 1 GiB, it fits the limit. */}}
{{- define "epserve.maxHeldBytes" -}}
{{- $held := int64 .Values.coordinator.maxHeldBytes -}}
{{- $memory := dig "limits" "memory" "" .Values.coordinator.resources -}}
{{- if $memory -}}
{{- $limit := include "epserve.bytes" $memory | int64 -}}
{{- $needed := add $held 1073741824 -}}
{{- if gt $needed $limit -}}
{{- $text := "values: coordinator.maxHeldBytes %d and 1 GiB of gRPC's buffers exceed coordinator.resources.limits.memory %v; lower the one or raise the other" -}}
{{- fail (printf $text $held $memory) -}}
{{- end -}}
{{- end -}}
{{- $held -}}
{{- end }}

{{/* Seconds from SIGTERM to SIGKILL: the drain, and time to write the last replies and exit. */}}
{{- define "epserve.coordinatorGraceSeconds" -}}
{{- add 10 (ceil (divf .Values.coordinator.drainTimeoutMs 1000)) -}}
{{- end }}

{{/* The same for a worker: it waits for the coordinator, and then for its own batches. */}}
{{- define "epserve.workerGraceSeconds" -}}
{{- add 10 (ceil (divf .Values.workers.leaveTimeoutMs 500)) -}}
{{- end }}

{{/* The coordinator's ports, each of its own: fails where two are the same. */}}
{{- define "epserve.checkPorts" -}}
{{- $c := .Values.coordinator -}}
{{- $taken := dict (toString $c.port) "port" -}}
{{- range ternary (list "metricsPort" "healthPort") (list "metricsPort") .Values.tls.enabled -}}
{{- $port := get $c . | toString -}}
{{- if hasKey $taken $port -}}
{{- $text := "values: coordinator.%s %s is coordinator.%s too; give each a port of its own" -}}
{{- fail (printf $text . $port (get $taken $port)) -}}
{{- end -}}
{{- $_ := set $taken $port . -}}
{{- end -}}
{{- end }}

{{- define "epserve.modelName" -}}
{{- default .Release.Name .Values.model.name -}}
{{- end }}

{{/* Where the workers and the operator reach the coordinator, ready or not. */}}
{{- define "epserve.controlAddress" -}}
{{ include "epserve.fullname" . }}-control:{{ .Values.coordinator.port }}
{{- end }}

{{/* Of a pod: what every pod of the chart has alike. */}}
{{- define "epserve.podCommon" -}}
serviceAccountName: {{ include "epserve.serviceAccountName" . | quote }}
# No part speaks to the Kubernetes API.
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "epserve.containerCommon" -}}
image: {{ include "epserve.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
{{- end }}

{{- define "epserve.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- end }}

{{/* Takes (list . ROLE), with ROLE one of coordinator, worker, operator. */}}
{{- define "epserve.volumes" -}}
{{- $ := index . 0 -}}
{{- $role := index . 1 -}}
- name: checkpoint
  {{- if $.Values.checkpoint.existingClaim }}
  persistentVolumeClaim:
    claimName: {{ $.Values.checkpoint.existingClaim | quote }}
    readOnly: true
  {{- else }}
  # Forbidden by the baseline and restricted Pod Security Standards; existingClaim is not.
  hostPath:
    path: {{ $.Values.checkpoint.hostPath | quote }}
    type: Directory
  {{- end }}
{{- if $.Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ get $.Values.tls (eq $role "coordinator" | ternary "secretName" (printf "%sSecretName" $role)) | quote }}
    defaultMode: 0440
{{- end }}
{{- with $.Values.sharedSecrets.secretName }}
- name: shared-secret
  secret:
    secretName: {{ . | quote }}
    defaultMode: 0440
    # Each part sees its own, the coordinator the list.
    items: [{key: {{ eq $role "coordinator" | ternary "secrets" $role }}, path: secret}]
{{- end }}
{{- end }}

{{- define "epserve.volumeMounts" -}}
- name: checkpoint
  mountPath: /checkpoint
  readOnly: true
  {{- with .Values.checkpoint.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
{{- if .Values.tls.enabled }}
- name: tls
  mountPath: /etc/epserve/tls
  readOnly: true
{{- end }}
{{- if .Values.sharedSecrets.secretName }}
- name: shared-secret
  mountPath: /etc/epserve/shared
  readOnly: true
{{- end }}
{{- end }}

{{- define "epserve.tlsArgs" -}}
{{- if .Values.tls.enabled -}}
- --tls-cert=/etc/epserve/tls/tls.crt
- --tls-key=/etc/epserve/tls/tls.key
- --tls-ca=/etc/epserve/tls/ca.crt
{{- end }}
{{- end }}

{{/* Of what calls the coordinator: its certificate, its secret, both or neither. */}}
{{- define "epserve.callerArgs" -}}
{{- include "epserve.tlsArgs" . }}
{{- if .Values.sharedSecrets.secretName }}
- --secret-file=/etc/epserve/shared/secret
{{- end }}
{{- end }}

{{/* A coordinator without a pod, as one that no node has room for, has no target that could be down. */}}
{{- define "epserve.releaseRules" -}}
{{- $series := "up{job=\"epserve\", namespace=%q, app_kubernetes_io_instance=%q}" -}}
name: {{ printf "epserve.release.%s" .Release.Name }}
rules:
  - alert: EpserveCoordinatorDown
    expr: {{ printf "absent(%s)" (printf $series .Release.Namespace .Release.Name) | quote }}
    for: 1m
    labels: {severity: critical}
    annotations:
      summary: {{ printf "Release %s has no coordinator to scrape" .Release.Name | quote }}
      description: Its pod is gone or waits for a node, or Prometheus does not find it.
{{- end }}
